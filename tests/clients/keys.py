"""The keys of the server that the clients talk to."""

ADMIN_KEY, USER_KEY, LIMITED_KEY = "key-admin", "key-user", "key-limited"

KEYS = f"""
[user]
key = "{USER_KEY}"
[limited]
key = "{LIMITED_KEY}"
requests_per_minute = 1
"""
