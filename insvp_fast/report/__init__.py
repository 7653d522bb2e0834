"""A run as one HTML page: ``results`` tests its model and finds the worst mistakes, ``page`` writes them down."""
