"""The studio: a film as a page in the browser, on which it is edited."""
