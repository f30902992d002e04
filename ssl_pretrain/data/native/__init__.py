"""Images decoded and cropped by compiled code, in threads."""
