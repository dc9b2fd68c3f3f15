//go:build race

package metatest

const race = true
