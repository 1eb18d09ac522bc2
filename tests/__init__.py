"""The tests. A package, so that none of the same name that is installed takes its place."""
