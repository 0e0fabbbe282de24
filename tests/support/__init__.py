"""What several tests need: models, cases, a PostgreSQL server, seeded faults. No tests here."""
