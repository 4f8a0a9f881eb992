def same(left, right):
    return list(left) == list(right) and list(left.line_numbers) == list(right.line_numbers)


def raising(error):
    raise error
