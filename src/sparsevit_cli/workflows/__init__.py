"""One module per command: a session in, a frozen result out. Nothing here prints."""
