"""`python -m sfumato` is the command `sfumato`; torchrun starts it so."""

from sfumato.serve.cli import main

if __name__ == "__main__":
    main()
