"""Everything outside: key sets, signers, secret engines. Each call has a deadline; none sees the database."""
