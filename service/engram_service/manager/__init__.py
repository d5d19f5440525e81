"""The manager process: it starts and watches the data process, and does all that is not on the path of a step."""
