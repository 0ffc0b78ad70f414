//go:build !amd64

package kernel

func available() []string { return []string{"portable"} }

func (p *product) dispatch() { p.portable() }

func peak(string) (perTurn int, loop func(turns int)) { return 8 * 2, peakPortable }

func addTo(dst, src []float32) { addPortable(dst, src) }

func maximum(best []float32, index []int32, x []float32, place int32) {
	maximumPortable(best, index, x, place)
}

func selected(dst, src []float32, index []int32, place int32) {
	selectedPortable(dst, src, index, place)
}

func transposeTo(dst, src []float32, rows, columns, dstRow, srcRow int) {
	transposePortable(dst, src, rows, columns, dstRow, srcRow)
}

func maskPositive(dst, grad, y []float32) { maskPositivePortable(dst, grad, y) }

func adam(p, m, v, average, grad []float32, c *AdamStep) {
	adamPortable(p, m, v, average, grad, c)
}

func roundTo(dst, src, mask []float32, relu bool) { roundPortable(dst, src, mask, relu) }

func joinTo(dst, src []float32, lines, dstLine, srcLine, count, far, step, n int) {
	joinPortable(dst, src, lines, dstLine, srcLine, count, far, step, n)
}

func poolPairs(y []float32, which []int8, strip []float32, line, channels int) {
	poolPairsPortable(y, which, strip, line, channels)
}

func unpoolJoin(top, dy []float32, which []int8, line, channels int) {
	unpoolJoinedPortable(top, dy, which, line)
}

func sumPairsTo(sum, pairs []float32, which []int8, rows int) {
	sumPairsPortable(sum, pairs, which, rows)
}

func unpoolPairs(image, dy []float32, which []int8, line, channels int) {
	unpoolPairsPortable(image, dy, which, line, channels)
}

func pairTo(dst, src []float32, count, n, far, step int) {
	pairPortable(dst, src, count, n, far, step)
}

func pool(y []float32, which []int32, strip []float32, size, line, channels int) {
	poolPortable(y, which, strip, size, line, channels)
}

func unpool(strip, dy []float32, which []int32, size, line, channels int) {
	unpoolPortable(strip, dy, which, size, line, channels)
}

func signStep(x, clean, gradient []float32, alpha, reach float32) (finite bool) {
	return signStepPortable(x, clean, gradient, alpha, reach)
}

func (t *transform) vectors(dst []float32, to strides, src []float32, from strides, n int, relu bool) bool {
	return false
}
