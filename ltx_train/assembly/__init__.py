"""From the configuration to objects: `resolve` decides once, the others build. No room below knows it."""
