"""Many runs: grids of settings and the comparisons of the paper, trained in processes and collected in tables."""
