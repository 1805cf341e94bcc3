"""The API's contract: requests and answers, as documented."""
