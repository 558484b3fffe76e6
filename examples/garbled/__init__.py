"""Five recorded incidents: real bugs in a state machine with its guards off, and how the debugger finds them."""
