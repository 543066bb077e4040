"""The layers of caches that all versions have, and of those of some versions one."""


class DynamicLayer:
    def update(self, make):
        return make()


class DynamicSlidingWindowLayer(DynamicLayer):
    def update(self, make):
        return make()


class QuantizedLayer(DynamicLayer):
    def update(self, make):
        return make()


class Fp8QuantizedLayer(QuantizedLayer):
    def update(self, make):
        return make()


class StaticLayer:
    def lazy_initialization(self, make):
        return make()
