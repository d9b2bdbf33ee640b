"""Data sets written one file after another: webdataset tars and TFRecords."""
