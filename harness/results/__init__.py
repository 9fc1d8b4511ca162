"""What is kept: shards (the log), the store (the view of it), the metric table, the record of a run."""
