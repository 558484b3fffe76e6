"""Five minutes with kvledger: text, a live view, a crash, a warm restart, an explanation."""
