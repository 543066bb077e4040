"""Where the package's libraries are."""


def get_binary_path_from_package(stem):
    return "/theirs/" + stem
