"""One small service for each library whose clients are shared; the recipes of the documentation."""
