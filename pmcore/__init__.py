"""Linux's page-table interfaces with one written meaning, and backends that answer them."""
