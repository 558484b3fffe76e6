"""Events and states as bytes, and back: codec, upcasters, snapshots, replay."""
