"""The HTTP port: a uvicorn server in a thread of its own, with limits of its own. app.py starts it first and stops it last.

`routes` says what is there, `server` runs it, `guard` and `protocol` keep connections within their limits, `pace` the thread.
"""
