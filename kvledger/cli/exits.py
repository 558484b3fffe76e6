"""Exit codes of the command line; ``kvledger --help`` explains them."""

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
