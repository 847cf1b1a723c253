"""Speech and text to tokens and back: SSL features, SSL tokens, acoustic tokens, phones."""
