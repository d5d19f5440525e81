"""Who calls and what it may: tokens, tenants, certificates, and the audit of what was done."""
