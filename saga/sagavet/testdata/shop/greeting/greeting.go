// Package greeting is what the example looks at.
package greeting

import (
	"time"

	"github.com/deed-go/deed/saga"
)

var Greet = saga.Define("greet", func(s *saga.Run, names map[string]string) (string, error) {
	for name, address := range names { // want `in the order of a map`
		if _, err := saga.Do(s, name, func(ctx saga.Step) (time.Time, error) {
			return time.Now(), mail(ctx, address, greeting(name))
		}); err != nil {
			return "", err
		}
	}
	return greeting("all"), nil // want `greeting in a saga`
})

func greeting(name string) string {
	if time.Now().Hour() < 12 {
		return "good morning, " + name
	}
	return "good day, " + name
}

func mail(saga.Step, string, string) error { return nil }
