"""What people look at after a job: tables on the terminal, figures, pages."""
