"""The files of the page that the server shows at `/`."""
