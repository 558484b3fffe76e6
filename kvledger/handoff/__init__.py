"""Both ends of a hand-over between a prefill and a decode instance."""
