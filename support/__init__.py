"""What one need not read to understand or change the method: other layers, formats, plumbing."""
