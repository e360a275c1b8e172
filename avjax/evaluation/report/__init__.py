"""Reports of finished runs: tables, plots and the HTML page."""
