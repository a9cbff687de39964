"""What people look at: figures, panels, sentences, the page, and the generated parts of the README."""
