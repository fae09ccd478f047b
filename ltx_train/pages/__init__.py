"""Pages for a browser: templates, their common look, and figures in them. Knows nothing of what is shown."""
