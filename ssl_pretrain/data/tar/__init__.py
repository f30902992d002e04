"""Reading and writing of tar shards in WebDataset's layout, locally and in object stores."""
