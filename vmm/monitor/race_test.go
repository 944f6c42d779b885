//go:build race

package monitor_test

// raceDetector tells that this test is built with the race detector.
const raceDetector = true
