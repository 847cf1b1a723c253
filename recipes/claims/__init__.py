"""The claims laboratory: what the paper says and never measured, measured at a small size (docs/claims.md)."""
