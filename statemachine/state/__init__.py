"""What the state machine knows: objects, places and orders, and the questions one can ask of them."""
