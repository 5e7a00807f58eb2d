"""Writers of data sets: every source (phantoms, CSV tables, public archives) becomes the same ArrayRecord format."""
