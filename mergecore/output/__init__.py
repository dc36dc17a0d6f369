"""The output directory: its layout, how it is written and published, what lies beside the weights, its check."""
