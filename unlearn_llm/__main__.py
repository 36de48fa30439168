"""`python -m unlearn_llm`, so that `accelerate launch -m unlearn_llm train ...` works."""

from unlearn_llm.cli import main

if __name__ == "__main__":
    main()
