"""`python -m tesp_api` is `tesp`."""

from tesp_api.cli import main

if __name__ == "__main__":
    main()
