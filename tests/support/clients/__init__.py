"""The clients that tests drive: official SDKs, pages in a browser, a terminal."""
