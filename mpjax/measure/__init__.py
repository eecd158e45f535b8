"""Floor 3, the windows: what a step really does, read off its jaxpr, and shown."""
