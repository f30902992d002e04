"""An HTTP service that embeds, compares and finds images with an exported network."""
