"""`make gpu`: the tests of the kernels, their times beside those of torch, one report. CPUs test its control flow."""
