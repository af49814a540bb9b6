"""tesp-api: a GA4GH Task Execution Service in front of Galaxy Pulsar."""

__version__ = "0.1.0"
