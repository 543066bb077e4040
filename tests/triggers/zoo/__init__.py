"""The package whose functions the rules of forms_test.sh name."""
