def same(left, right):
    return list(left) == list(right)


def raising(error):
    raise error
