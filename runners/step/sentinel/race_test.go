//go:build race

package sentinel

// The race detector makes the demo's training several times slower; the parts
// that run at once are tested with it in their own packages.
func init() { raceDetector = true }
