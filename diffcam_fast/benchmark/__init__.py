"""How this library is measured: beneath `diffcam bench`, and beneath the benchmarks of its source repository.

`measure` times candidates in turns, `kernels` and `explanations` say what is timed, `peers` what beside it, `machine`
where, and `report` writes it down.
"""
