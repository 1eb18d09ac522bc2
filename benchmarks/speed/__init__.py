"""How fast the library is, beside the fastest things that a user could write instead."""
